import json
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest

from reprobe.errors import DataError, UnknownData, UsageError
from reprobe.prompts import PromptSet, bundled

ROWS: list[dict[str, Any]] = [
    {
        "id": "a-1",
        "text": "Iron sinks, says “Ida” 🙂.",
        "label": 1,
        "group": "iron",
        "spans": {"subject": [0, 4], "speaker": [18, 21]},
        "mass": 7.5,
        "source": "Ida",
    },
    {
        "id": "a-2",
        "text": "Cork, too,\nsinks.",
        "label": 0,
        "group": "cork",
        "spans": {},
        "mass": 2.0,
        "source": None,
    },
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def written(folder: Path, suffix: str) -> Path:
    """The same prompts as a file of each kind; CSV and Parquet by polars."""
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        return write_jsonl(path, ROWS)
    if suffix == ".json":
        path.write_text(json.dumps(ROWS))
        return path
    flat = pl.DataFrame([row | {"spans": json.dumps(row["spans"])} for row in ROWS])
    if suffix == ".csv":
        flat.select(reversed(flat.columns)).write_csv(path)
    else:
        PromptSet.from_records(ROWS).frame.write_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_the_same_prompts_have_the_same_digest_in_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    prompts = PromptSet.load(written(tmp_path, suffix))
    assert prompts.frame.rows(named=True) == PromptSet.from_records(ROWS).frame.select(prompts.frame.columns).rows(
        named=True
    )
    assert prompts.digest == PromptSet.from_records(ROWS).digest
    assert prompts.name == "rows"


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [{"id": "x", "text": "One."}, {"id": "y", "text": "Two."}],
        [{"id": "x", "messages": [{"role": "user", "content": "One?"}], "pair": "p", "tags": ["a", "b"]}],
        [{"id": "x", "text": "One.", "label": "joy", "facts": [{"prompt": "p", "target": None}]}],
    ],
)
def test_a_set_written_and_read_is_the_same_set(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    prompts = PromptSet.from_records(rows)
    prompts.to_jsonl(tmp_path / "a.jsonl")
    back = PromptSet.load(tmp_path / "a.jsonl")
    assert back.digest == prompts.digest
    assert back.has_groups == prompts.has_groups
    lines = (tmp_path / "a.jsonl").read_text("utf-8").splitlines()
    assert len({tuple(json.loads(line)) for line in lines}) == 1  # every row has the same keys
    assert ("group" in json.loads(lines[0])) == prompts.has_groups


def test_a_lone_side_of_a_pair_that_is_its_own_group_stays_so_in_a_file(tmp_path: Path) -> None:
    prompts = PromptSet.from_records([{"id": "x", "text": "One.", "group": "x", "pair": "p"}])
    prompts.to_jsonl(tmp_path / "a.jsonl")
    assert PromptSet.load(tmp_path / "a.jsonl").digest == prompts.digest


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_data_set_loads_and_splits(name: str) -> None:
    prompts = PromptSet.load(name)
    assert prompts.name == name
    assert prompts.has_groups
    assert len(prompts.split().test)
    assert all(text == text.strip() for text in prompts.frame["text"].drop_nulls())


@pytest.mark.parametrize("wheel", [True, False])
def test_bundled_data_is_found_in_a_wheel_and_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: bool
) -> None:
    monkeypatch.setattr("reprobe.prompts.catalog._HERE", tmp_path / "reprobe" / "prompts" / "bundled.py")
    data = tmp_path / "reprobe" / "data" if wheel else tmp_path / "data"
    data.mkdir(parents=True)
    write_jsonl(data / "mine.jsonl", ROWS)
    if not wheel:  # a folder named data beside site-packages' reprobe is nobody's
        with pytest.raises(UnknownData, match="are in neither"):
            bundled()
        (tmp_path / "pyproject.toml").touch()
    assert bundled() == ["mine"]
    assert PromptSet.load("mine").ids == ["a-1", "a-2"]


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UnknownData, match=r"no data set 'citeis'. Did you mean 'cities'\?.*Bundled: .*emotions"):
        PromptSet.load("citeis")
    with pytest.raises(UnknownData, match=r"no data set 'nowhere/cities.jsonl'"):
        PromptSet.load("nowhere/cities.jsonl")


def test_a_file_in_this_folder_is_found_also_by_an_ending_in_capitals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "A.CSV").write_text("text\nIron sinks.\n")
    monkeypatch.chdir(tmp_path)
    assert PromptSet.load("A.CSV").texts == ["Iron sinks."]


def test_a_file_of_another_kind_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Iron sinks.")
    with pytest.raises(UnknownData, match=r"\.jsonl, \.json, \.csv and \.parquet"):
        PromptSet.load(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "row 2 is not JSON"),
        ("a.json", "{", "not a valid .json file"),
        ("a.jsonl", "\n", "holds no prompts"),
        ("a.json", "[]", "holds no prompts"),
        ("a.csv", "", "not a valid .csv file"),
        ("a.parquet", "PAR0", "not a valid .parquet file"),
        ("a.jsonl", '{"text": "x", "id": 1}\n{"text": "y", "id": 1}\n', "duplicate ids: 1"),
        ("a.json", '[{"text": "x"}, 3]', "must be a list of objects"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        PromptSet.load(tmp_path / name)
    assert says in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert PromptSet.load(path).digest == PromptSet.from_records(ROWS).digest


def test_columns_are_mapped_and_those_displaced_are_kept(tmp_path: Path) -> None:
    rows = [{"claim": "Iron sinks.", "truth": 1, "label": "metal", "topic": 12, "nr": "n1"}]
    path = write_jsonl(tmp_path / "claims.jsonl", rows)
    prompts = PromptSet.load(path, text="claim", label="truth", group="topic", id="nr")
    row = prompts.frame.row(0, named=True)
    assert (row["id"], row["text"], row["label"], row["group"]) == ("n1", "Iron sinks.", 1, "12")
    assert row["label_given"] == "metal"
    assert "claim" not in row
    with pytest.raises(UnknownData, match=r"no column 'claims'. Did you mean 'claim'\? There is: claim, truth"):
        PromptSet.load(path, text="claims")


def test_two_columns_can_be_swapped() -> None:
    dataset = datasets.Dataset.from_list([{"text": "yes", "label": "Is iron heavy?"}])
    row = PromptSet.from_hf(dataset, text="label", label="text").frame.row(0, named=True)
    assert (row["text"], row["label"]) == ("Is iron heavy?", "yes")


def test_cells_of_a_csv_become_numbers_only_where_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,code,size,share,flag\n12,True,007,10,0.50,a\n13,False,008,-3,1e-3,\n")
    frame = PromptSet.load(path).frame
    assert frame["text"].to_list() == ["12", "13"]
    assert frame["label"].to_list() == [1, 0]
    assert frame["code"].to_list() == ["007", "008"]
    assert frame["size"].to_list() == [10, -3]
    assert frame["share"].to_list() == [0.5, 0.001]
    assert frame["flag"].to_list() == ["a", None]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_limit_takes_the_first_prompts(tmp_path: Path, suffix: str) -> None:
    assert PromptSet.load(written(tmp_path, suffix), limit=1).ids == ["a-1"]
    with pytest.raises(UsageError, match="limit=0"):
        PromptSet.load(written(tmp_path, suffix), limit=0)


def hf_rows() -> list[dict[str, Any]]:
    return [{"question": f"What is {i}?", "kind": i % 2, "topic": f"t{i // 2}"} for i in range(6)]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_hugging_face_data_set_is_read_by_its_columns(streamed: bool) -> None:
    dataset = datasets.Dataset.from_list(hf_rows())
    source = dataset.to_iterable_dataset() if streamed else dataset
    prompts = PromptSet.from_hf(source, text="question", label="kind", group="topic", limit=4, name="questions")
    assert prompts.texts == [f"What is {i}?" for i in range(4)]
    assert prompts.labels.to_list() == [0, 1, 0, 1]
    assert prompts.frame["group"].to_list() == ["t0", "t0", "t1", "t1"]
    assert prompts.name == "questions"
    with pytest.raises(UnknownData, match="no column 'questoin'"):
        PromptSet.from_hf(source, text="questoin")


def test_a_reordered_hugging_face_data_set_is_read_in_its_order() -> None:
    dataset = datasets.Dataset.from_list(hf_rows()).select([3, 0])
    assert PromptSet.from_hf(dataset, text="question").texts == ["What is 3?", "What is 0?"]


def test_several_splits_at_once_are_refused() -> None:
    one = datasets.Dataset.from_list(hf_rows())
    with pytest.raises(UsageError, match=r"pass one of train, test"):
        PromptSet.from_hf(datasets.DatasetDict({"train": one, "test": one}), text="question")
    with pytest.raises(UsageError, match="not a list"):
        PromptSet.from_hf(hf_rows(), text="question")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set folder with two splits, and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "quiz"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", hf_rows())
    write_jsonl(folder / "test.jsonl", hf_rows()[:2])
    return folder


def test_an_hf_address_names_a_data_set_and_a_split(hub_folder: Path) -> None:
    assert len(PromptSet.load(f"hf:{hub_folder}:train", text="question")) == 6
    assert len(PromptSet.load(f"hf:{hub_folder}::test", text="question")) == 2
    prompts = PromptSet.load(f"hf:{hub_folder}:default:train", text="question", label="kind", limit=3)
    assert prompts.texts == ["What is 0?", "What is 1?", "What is 2?"]
    assert prompts.name == "quiz"


def test_where_there_is_one_split_it_need_not_be_named(hub_folder: Path) -> None:
    (hub_folder / "test.jsonl").unlink()
    assert len(PromptSet.load(f"hf:{hub_folder}", text="question")) == 6
    assert len(PromptSet.load(f"hf:{hub_folder}:default", text="question")) == 6


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [("quiz.py", "import this", "scripts are no longer"), ("train.jsonl", '{"question": "?"}\n{"', "JSON parse error")],
)
def test_a_hugging_face_data_set_that_cannot_be_read_is_said_to_be_so(
    hub_folder: Path, name: str, content: str, says: str, limit: int | None
) -> None:
    (hub_folder / name).write_text(content)
    with pytest.raises(DataError, match=f"quiz cannot be read by the library datasets: .*{says}"):
        PromptSet.load(f"hf:{hub_folder}:train", text="question", limit=limit)


def test_an_hf_address_that_leads_nowhere_says_what_exists(hub_folder: Path) -> None:
    with pytest.raises(UnknownData, match=r"several splits; .*train, test|several splits; .*test, train"):
        PromptSet.load(f"hf:{hub_folder}", text="question")
    with pytest.raises(UnknownData, match=r"no split 'trian'. Did you mean 'train'"):
        PromptSet.load(f"hf:{hub_folder}:trian", text="question")
    with pytest.raises(UnknownData, match="no config 'hard'"):
        PromptSet.load(f"hf:{hub_folder}:hard:train", text="question")
    with pytest.raises(UnknownData, match="no column 'query'"):
        PromptSet.load(f"hf:{hub_folder}:train", text="query")
    with pytest.raises(UnknownData, match="there is no data set"):
        PromptSet.load(f"hf:{hub_folder}/nothing", text="question")
    with pytest.raises(UsageError, match="not a data set address"):
        PromptSet.load("hf:a:b:c:d")
    with pytest.raises(UsageError, match="format is for files"):
        PromptSet.load(f"hf:{hub_folder}:train", format="table")
