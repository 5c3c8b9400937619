"""Takedown lists: kinds told apart by form, and what they cover."""

import hashlib

import pytest

from vesl.transforms.takedown import Takedown
from vesl.transforms.urls import key

KEY, SHA = "0123456789abcdef01234567", hashlib.sha256(b"x").hexdigest()


def parse(text: str) -> Takedown:
    return Takedown.parse([("list.txt", text)])


def test_kinds_are_told_apart_by_form() -> None:
    found = parse(
        f"\ufeff# a comment\n\n{KEY.upper()}\r\n {SHA}\t# of the stored image\n"
        "HTTP://A.example:80/x/../y?b=1#part\nBad.Example.\nbücher.example # and all below\n"
    )
    url = "http://a.example/y?b=1"
    assert found.keys == {KEY, key(url)}
    assert found.sha256 == {SHA}
    assert found.urls == {url}
    assert found.domains == {"bad.example", "xn--bcher-kva.example"}
    assert found
    assert not parse("# nothing\n \n")


MALFORMED = (
    *("0123", KEY[:-1], SHA + "0", "word", "two words.example", "ftp://a.example/x", "http://", "http://a b/"),
    *("a.example/x", "a.example:80", "user@a.example", "*.a.example", "..", ".example", "a..example", "1.2", "-"),
    *("javascript:x", "\x00.a"),
)


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_line_is_named(line: str) -> None:
    with pytest.raises(ValueError, match=r"^two\.txt:3: "):
        Takedown.parse([("one.txt", "a.example\n"), ("two.txt", f"# first\nb.example\n{line}\nc.example\n")])


@pytest.mark.parametrize(
    ("sample", "covered"),
    [
        ((KEY, "", ""), True),
        ((KEY.upper(), "", ""), True),
        (("", "", SHA), True),
        (("", "", SHA.upper()), True),
        (("", "http://A.example/./x#y", ""), True),
        ((key("http://a.example/x"), "", ""), True),
        (("", "http://a.example/xx", ""), False),
        (("", "https://a.example/x", ""), False),
        (("", "https://bad.example/any?q", ""), True),
        (("", "http://user:pw@IMG.cdn.bad.example.:8080/", ""), True),
        (("", "http://notbad.example/", ""), False),
        (("", "http://bad.example.org/", ""), False),
        (("", "http://org/bad.example", ""), False),
        (("", "http://evil.example/?bad.example", ""), False),
        (("", "http://b%C3%BCcher.example/", ""), True),
        (("", "not a url", ""), False),
        (("", "http://[::1]/", ""), False),
        (("0" * 24, "http://good.example/", "0" * 64), False),
    ],
)
def test_what_is_covered(sample: tuple[str, str, str], covered: bool) -> None:
    found = parse(f"{KEY}\n{SHA}\nhttp://a.example/x\nbad.example\nbücher.example\n")
    assert found.covers(*sample) is covered
    assert not Takedown().covers(*sample)
