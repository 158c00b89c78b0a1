"""Write tasks/last_word.jsonl: paragraphs of the held-out text without their last word, and four words to end them."""

import json
import random
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "tiny_moe" / "heldout.txt"
ROWS = HERE / "tasks" / "last_word.jsonl"
COUNT, CHOICES = 64, 4

# 12 to 80 words, a space, and a last word of letters
PARAGRAPH = re.compile(r"(?:\S+\s+){12,80}\S+ (?P<word>[a-z]{4,})\.")


def rows() -> list[dict]:
    """Choose the paragraphs; the wrong words of a row are the last words of other rows."""
    draw = random.Random(0)
    paragraphs = re.split(r"\n\s*\n", TEXT.read_text(encoding="utf-8"))
    found = [match for paragraph in paragraphs if (match := PARAGRAPH.fullmatch(paragraph))]
    chosen = draw.sample(found, COUNT)
    words = sorted({match["word"] for match in chosen})
    made = []
    for match in chosen:
        choices = [match["word"], *draw.sample([word for word in words if word != match["word"]], CHOICES - 1)]
        draw.shuffle(choices)
        made.append({"text": match[0][: match.start("word") - 1], "word": match["word"], "choices": choices})
    return made


if __name__ == "__main__":
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
