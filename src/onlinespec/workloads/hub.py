"""Prompts from a data set on the Hugging Face Hub, through the optional `datasets` package."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from onlinespec.workloads.base import Prompt, Split, check_split

PROMPT_COLUMNS = ("prompt", "question", "text")  # the first that a data set has is used
REFERENCE_COLUMNS = ("response", "answer")


class HubWorkload:
    """The rows of one split of a data set, in its order. Seed and split of `prompts` make no difference.

    Args:
        spec: "dataset" or "dataset:split", for instance "openai/gsm8k:test"; the default split is "train".

    Raises:
        ValueError: if no data set is named, or it has no column with prompts.
        ImportError: if the `datasets` package is not installed.
    """

    def __init__(self, spec: str) -> None:
        dataset, _, hub_split = spec.partition(":")
        if not dataset:
            raise ValueError('"hf:" names no data set; write hf:dataset or hf:dataset:split')
        self.name = dataset.rpartition("/")[2]
        self._rows = _load(dataset, hub_split or "train")
        self._prompt_column = _column(self._rows.column_names, spec)

    def prompts(self, seed: int, split: Split = "stream") -> Iterator[Prompt]:
        check_split(split)
        return (self._prompt(number, row) for number, row in enumerate(self._rows))

    def _prompt(self, number: int, row: dict[str, Any]) -> Prompt:
        text = row[self._prompt_column]
        if not isinstance(text, str):
            column = self._prompt_column
            raise ValueError(f"{self.name}, row {number}: {column!r} is {type(text).__name__}, not a string")
        reference = next((row[key] for key in REFERENCE_COLUMNS if isinstance(row.get(key), str)), None)
        return Prompt(f"{self.name}-{number}", text, self.name, reference)


def _load(dataset: str, hub_split: str) -> Any:
    try:
        datasets = import_module("datasets")
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ImportError(
            f'"hf:{dataset}" needs the datasets package; install it with: pip install "onlinespec[hub]"'
        ) from error
    return datasets.load_dataset(dataset, split=hub_split)


def _column(columns: list[str], spec: str) -> str:
    for column in PROMPT_COLUMNS:
        if column in columns:
            return column
    raise ValueError(f'"hf:{spec}" has none of the columns {", ".join(PROMPT_COLUMNS)}; it has {", ".join(columns)}')
