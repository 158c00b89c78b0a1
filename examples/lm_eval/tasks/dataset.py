"""Read the rows of the tasks from the file beside this one; lm-eval itself reads paths from the working directory."""

from pathlib import Path

from datasets import Dataset


def last_word(**metadata) -> dict[str, Dataset]:
    """Return the rows; lm-eval passes the metadata of the task."""
    return {"test": Dataset.from_json(str(Path(__file__).with_name("last_word.jsonl")))}
