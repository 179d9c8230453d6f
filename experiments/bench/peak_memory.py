"""Extract generated prompts in a process of its own, and print that process's peak memory.

    python experiments/bench/peak_memory.py MODEL N

Prints one JSON object: resident bytes when the model is loaded, the peak of resident bytes while extracting, and how
much was extracted. Linux only: the peak is VmHWM, which can be set back once the model is loaded; what `getrusage`
calls the maximum would include loading, and even the process that started this one.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import reprobe as rp

#: Rows of one shard: few, so that already N prompts fill several and the larger run differs in nothing but length.
SHARD_ROWS = 512
SYLLABLES = ("ba", "de", "fi", "go", "lu", "mar", "nes", "pol", "ri", "sta", "to", "ver")


def prompts(n: int) -> rp.PromptSet:
    """n different statements of like length about towns that do not exist."""

    def name(i: int) -> str:
        base = len(SYLLABLES)
        return "".join(SYLLABLES[i // base**k % base] for k in range(4)).capitalize()

    return rp.PromptSet.from_records(
        [{"text": f"The town of {name(7 * i)} lies on a river and has {1000 + i} inhabitants."} for i in range(n)]
    )


def resident(field: str) -> int:
    """Bytes of this process by the kernel's account: VmRSS now, or VmHWM at most."""
    kilobytes = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert kilobytes is not None
    return int(kilobytes[1]) * 1024


def main(model: str, n: str) -> None:
    lm = rp.LanguageModel.load(model)
    data, sites = prompts(int(n)), f"resid.post@0:{lm.n_layers // 3}"
    lm.identity  # noqa: B018  # reads all weights once, which every extraction does
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    loaded = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        store = rp.extract(lm, data, sites=sites, at="all", to=Path(folder) / "s.reprobe", shard_rows=SHARD_ROWS)
        peak, info = resident("VmHWM"), store.info()
    print(
        json.dumps(
            {
                "prompts": len(data),
                "rows": info.rows,
                "shards": info.shards,
                "bytes on disk": info.bytes_on_disk,
                "bytes resident before": loaded,
                "bytes resident at most": peak,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
