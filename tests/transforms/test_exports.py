"""Text from strangers in a data card; what samples look like in each format is tested by the formats' own readers."""

import pytest

from vesl.transforms.exports import escaped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red ball", "a red ball"),
        ("straße, 犬", "straße, 犬"),
        ("<script>alert(1)</script>", r"&lt;script&gt;alert\(1\)&lt;\/script&gt;"),
        ("a | b\n# c", "a \\| b\ufffd\\# c"),
        ("[x](http://e.org) `y` **z**", r"\[x\]\(http\:\/\/e\.org\) \`y\` \*\*z\*\*"),
        ("\u202edog\u200b\x1b[1m&amp;", "\ufffddog\ufffd\ufffd\\[1m&amp;amp;"),
    ],
)
def test_text_from_strangers_stays_text(text: str, shown: str) -> None:
    assert escaped(text) == shown
