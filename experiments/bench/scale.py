"""What the activations of a large model over many tokens cost: arithmetic only, nothing is run.

    uv run python experiments/bench/scale.py

Reads the inputs from the first table of SCALE.md beside it, and writes the derived tables between its two marks.
Bytes are decimal (GB = 10⁹) except where MiB or GiB are said. Does not measure: replace an input, run again.
"""

import math
from pathlib import Path
from typing import NamedTuple

from reprobe.store import Grid

DOCUMENT = Path(__file__).with_name("SCALE.md")
BEGIN, END = "<!-- derived: written by scale.py -->", "<!-- end of derived -->"


class Case(NamedTuple):
    """Which sites are stored: how many of them are d_model wide, and how many d_ff."""

    name: str
    narrow: int
    wide: int

    @property
    def sites(self):
        return self.narrow + self.wide

    def row_bytes(self, x):
        """In bfloat16, over all sites."""
        return 2 * (self.narrow * x["d_model"] + self.wide * x["d_ff"])

    def widths(self, x):
        return [x["d_model"]] * self.narrow + [x["d_ff"]] * self.wide


def cases(x):
    blocks = x["blocks"]
    # heads are d_model wide together; resid.pre@l is resid.post@l−1; embed and final come once
    return (
        Case("one site", 1, 0),
        Case("ten sites", 10, 0),
        Case(f"every `resid.post` ({blocks})", blocks, 0),
        Case("every distinct site", 5 * blocks + 2, blocks),
    )


def inputs(text):
    """Name → number of the lines `| name | number | unit | from |` of the first table."""
    out = {}
    for line in text.split(BEGIN)[0].splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[0] != "input" and set(cells[0]) - {"-"}:
            number = float(cells[1].replace(",", ""))
            out[cells[0]] = int(number) if number.is_integer() else number
    return out


def block_parameters(x):
    """Weights of one block: queries and outputs, keys and values (grouped), gate, up and down."""
    d, kv, ff = x["d_model"], x["key and value width"], x["d_ff"]
    return 2 * d * d + 2 * d * kv + 3 * d * ff


def flop_per_token(x):
    """A multiply and an add per weight; scores and their weighted sum over half the prompt, on average."""
    attention = 4 * (x["tokens per prompt"] / 2) * x["d_model"]
    return x["blocks"] * (2 * block_parameters(x) + attention)


def tokens_per_second(x):
    """Of one rank: one copy of the model, of whose GPUs one computes at a time."""
    return x["peak of a GPU"] * x["utilisation"] / flop_per_token(x)


def ranks_per_node(x):
    return x["GPUs per node"] // x["GPUs per rank"]


def capacities(x):
    """What moves a rank's bytes, and how many bytes of rows per second it can move for that rank."""
    n = ranks_per_node(x)
    return {
        "PCIe, device to host": x["PCIe of a GPU"],
        "writer, one process": x["writer"],
        "disks of the node": x["disks of a node"] * x["compression ratio"] / n,
        "network of the node": x["network of a node"] * x["compression ratio"] / n,
    }


def reading_speeds(x):
    """Bytes of rows per second of one process: in order, shuffled."""
    return x["reader"], x["reader"] * x["shuffled"]


def proposed(case, x):
    """Shards of about a GiB per file, unless the shard of all sites would outgrow the rank's buffer."""
    widest = 2 * max(case.widths(x))
    rows = min(2**30 // widest, int(x["buffer of a rank"]) // case.row_bytes(x))
    chunk = 512  # what Grid.of takes for rows of this width
    return Grid.of(x["tokens"], [2 * w for w in case.widths(x)], shard_rows=max(chunk, rows // chunk * chunk))


def default(case, x):
    return Grid.of(x["tokens"], [2 * w for w in case.widths(x)])


def quantity(value, unit):
    """Three digits and a prefix: 16.4 TB."""
    power = min(max(0, math.floor(math.log10(value) / 3)) if value else 0, 5)
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"


def percent(share):
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def derived(x):
    speed, ranks = tokens_per_second(x), ranks_per_node(x)
    hours = x["tokens"] / speed / 3600
    per_block, flop = block_parameters(x), flop_per_token(x)
    parts = [
        "### Compute",
        table(
            ["quantity", "arithmetic", "value"],
            [
                ["weights of a block", "2·d² + 2·d·kv + 3·d·ff", f"{per_block:,}"],
                ["weights of all blocks", f"{x['blocks']} · that", f"{x['blocks'] * per_block:,}"],
                ["weights in bfloat16", "2 bytes each", quantity(2 * x["blocks"] * per_block, "B")],
                ["work per token", "blocks · (2·weights + 4·(prompt/2)·d)", quantity(flop, "FLOP")],
                ["speed of a rank", "peak · utilisation / work", f"{speed:,.0f} tokens/s"],
                ["time on one rank", "tokens / speed", f"{hours:,.1f} h"],
                ["GPU hours", f"{x['GPUs per rank']} GPUs per rank", f"{hours * x['GPUs per rank']:,.0f} h"],
                [f"time on one node ({ranks} ranks)", "", f"{hours / ranks:,.1f} h"],
                ["time on 16 nodes", "", f"{hours / ranks / 16:,.2f} h"],
            ],
        ),
        "### Bytes, and what moving them takes at that speed",
    ]
    rows, loads = [], []
    for case in cases(x):
        row = case.row_bytes(x)
        rows.append(
            [
                case.name,
                case.sites,
                f"{row:,} B",
                quantity(row * x["tokens"], "B"),
                quantity(row * x["tokens"] / x["compression ratio"], "B"),
                quantity(row * speed, "B/s"),
                quantity(row * speed * ranks / x["compression ratio"], "B/s"),
            ]
        )
        load = {name: row * speed / capacity for name, capacity in capacities(x).items()}
        first = max(load, key=load.__getitem__)
        verdict = (
            f"{first}: {load[first]:.1f} times what it can" if load[first] > 1 else "none: the GPU waits for nothing"
        )
        longer = max(1.0, load[first])
        loads.append([case.name, *map(percent, load.values()), verdict, f"{hours * longer / ranks:,.1f} h"])
    parts += [
        table(
            ["stored", "sites", "per token", "in all", "compressed", "per rank", "per node, on the wire or disk"],
            rows,
        ),
        "### Which resource saturates first",
        "Load of each resource while the GPU runs at full speed, per rank; above 100 % it is the GPU that waits.",
        table(["stored", *capacities(x), "saturated first", "time on one node"], loads),
        "### Shards, files and objects",
    ]
    rows = []
    for case in cases(x):
        for name, grid in (("default", default(case, x)), ("proposed", proposed(case, x))):
            rows.append(
                [
                    case.name,
                    name,
                    f"{grid.shard_rows:,}",
                    f"{grid.chunk_rows:,}",
                    f"{grid.shard_rows * 2 * x['d_model'] / 2**20:,.0f} MiB",
                    f"{grid.shard_rows * case.row_bytes(x) / 2**30:,.2f} GiB",
                    f"{grid.n_shards:,}",
                    f"{grid.n_shards * case.sites:,}",
                    f"{grid.shard_rows / speed:,.2f} s",
                ]
            )
    parts += [
        table(
            [
                "stored",
                "grid",
                "shard rows",
                "chunk rows",
                "file of a d_model site",
                "shard, all sites",
                "shards = commits = HDF5 files",
                "zarr files",
                "a rank's shard every",
            ],
            rows,
        ),
        "### Index and tokens",
        table(
            ["what", "arithmetic", "size"],
            [
                ["index.parquet", "rows · bytes per row", quantity(x["tokens"] * x["index"], "B")],
                ["tokens.parquet", "tokens · bytes per token", quantity(x["tokens"] * x["token table"], "B")],
                # row: 8; position, token, n_tokens: 4 each; prompt, group, pair: 16 each, whatever they hold
                ["index in memory, at least", "rows · (8 + 3·4 + 3·16)", quantity(x["tokens"] * 68, "B")],
            ],
        ),
        "### Reading one epoch of one d_model site back",
        table(
            ["processes", "in order", "shuffled"],
            [
                [n, *(f"{2 * x['d_model'] * x['tokens'] / (n * v) / 3600:,.2f} h" for v in reading_speeds(x))]
                for n in (1, 8, 64)
            ],
        ),
    ]
    return "\n\n".join(parts)


def document(text):
    """`text` with its derived part made from its inputs."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{derived(inputs(text))}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
