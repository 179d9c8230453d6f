"""Hugging Face data sets.

Enters: `NAME[:config][:split]`, or a `datasets` object. Leaves: a polars frame with that data set's own
columns. Does not know the canonical columns. `datasets` is imported only when one is asked for.
"""

import itertools
from typing import Any

import polars as pl

from reprobe.errors import DataError, FetchFailed, ReprobeError, UnknownData, UsageError
from reprobe.prompts.columns import from_records, unknown


def fetch(address: str, limit: int | None) -> pl.DataFrame:
    """The data set at `NAME[:config][:split]`, where NAME is a hub id or a local folder.

    One word after NAME is a config if the data set has a config of that name, else a split; `NAME::split` is
    always a split. With `limit`, rows are streamed and only that many are fetched. Raises `UnknownData` (with
    what exists) if the name, config or split does not exist or must be chosen, `FetchFailed` if it cannot be
    reached, `DataError` if `datasets` cannot read it.
    """
    import datasets

    name, *rest = address.split(":")
    if not name or len(rest) > 2:
        raise UsageError(
            f"not a data set address: 'hf:{address}'; write hf:NAME, hf:NAME:split or hf:NAME:config:split"
        )
    try:
        configs = datasets.get_dataset_config_names(name)
        config, split = _config_and_split(rest, configs)
        if config is not None and config not in configs:
            raise unknown("config", config, configs, f"hf:{name}")
        if config is None and len(configs) > 1 and "default" not in configs:
            raise UnknownData(f"hf:{name} has several configs; write hf:{name}:CONFIG with one of {', '.join(configs)}")
        splits = datasets.get_dataset_split_names(name, config)
        if split is not None and split not in splits:
            raise unknown("split", split, splits, f"hf:{name}")
        if split is None and len(splits) > 1:
            raise UnknownData(f"hf:{name} has several splits; write hf:{name}::SPLIT with one of {', '.join(splits)}")
        loaded = datasets.load_dataset(name, config, split=split or splits[0], streaming=limit is not None)
        return frame(loaded, limit, f"hf:{name}")
    except FileNotFoundError as error:  # not on the hub, no such folder, or no data in it
        raise UnknownData(f"there is no data set hf:{name}: {error}") from error
    except OSError as error:  # every network failure, offline mode included, is one
        raise FetchFailed(f"hf:{name} could not be fetched: {error}") from error
    except (ReprobeError, MemoryError):
        raise
    except Exception as error:  # a loading script, a damaged file: of these every library raises its own
        why = error.__cause__ or error  # "an error occurred", says the outermost
        raise DataError(f"hf:{name} cannot be read by the library datasets: {why}") from error


def _config_and_split(rest: list[str], configs: list[str]) -> tuple[str | None, str | None]:
    if len(rest) == 2:
        return rest[0] or None, rest[1] or None
    only = rest[0] if rest else ""
    return (only, None) if only in configs else (None, only or None)


def frame(dataset: Any, limit: int | None, name: str) -> pl.DataFrame:
    """The rows of a `Dataset` or `IterableDataset`, the first `limit` of them if it is not None."""
    import datasets

    if isinstance(dataset, datasets.Dataset):
        chosen = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
        table = pl.from_arrow(chosen.with_format("arrow")[:])
        return table if isinstance(table, pl.DataFrame) else table.to_frame()
    if isinstance(dataset, datasets.IterableDataset):
        return from_records(itertools.islice(dataset, limit), name)
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise UsageError(
            f"{name} has several splits: pass one of {', '.join(dataset)}, e.g. dataset[{next(iter(dataset))!r}]"
        )
    raise UsageError(f"from_hf takes a datasets.Dataset or IterableDataset, not a {type(dataset).__name__}")


def title(dataset: Any) -> str:
    """A data set's name for people."""
    info = getattr(dataset, "info", None)
    return getattr(info, "dataset_name", None) or "hf"
