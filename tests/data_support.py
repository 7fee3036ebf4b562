"""What the tests of data share: documents and a small byte-pair tokenizer."""

from functools import cache

from moejax import data
from moejax.data import Document

SAMPLE = "def añadir(x):\n    return x + 1  # 例 🎉\n\n\nclass Foo:\n    pass\n"


def documents(n, length=40):
    return [Document(f"d/{i}.py", f"line {i}\n" * (1 + i % length)) for i in range(n)]


@cache
def small_bpe():
    return data.train_bpe([Document("a", SAMPLE * 3), Document("b", "for x in y: pass\n" * 9)], 300)


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) > 20
    return message
