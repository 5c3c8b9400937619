"""A key made today must be the key made in five years: the vectors here are frozen."""

import hashlib
import time

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesl.transforms.urls import NORMALISATION, key, keys, normalise

# A changed line here means another NORMALISATION: old and new keys of one address would differ.
VECTORS = [
    ("http://example.com", "http://example.com/"),
    ("HTTP://EXAMPLE.com/A", "http://example.com/A"),
    ("http://example.com:80/a", "http://example.com/a"),
    ("https://example.com:443/a", "https://example.com/a"),
    ("https://example.com:80/a", "https://example.com:80/a"),
    ("https://example.com:/a", "https://example.com/a"),
    ("https://example.com:08443/a", "https://example.com:8443/a"),
    ("https://example.com:65536/a", None),
    ("https://example.com:8o/a", None),
    ("http://a.com/x/./y/../z.jpg", "http://a.com/x/z.jpg"),
    ("http://a.com/x/%2e%2E/z.jpg", "http://a.com/z.jpg"),
    ("http://a.com/../../z.jpg", "http://a.com/z.jpg"),
    ("http://a.com//x///y", "http://a.com//x///y"),
    ("http://a.com/%7euser/%e4%c3", "http://a.com/%7euser/%e4%c3"),
    ("http://a.com/~user/%zz%", "http://a.com/~user/%zz%"),
    ("http://a.com/a b.jpg", "http://a.com/a%20b.jpg"),
    ('http://a.com/<"`{|}^>', "http://a.com/%3C%22%60%7B|%7D%5E%3E"),
    ("  \t\n http://a.com/x \r\n", "http://a.com/x"),
    ("\ufeffhttp://a.com/x\xa0\u2003", "http://a.com/x"),
    ("\0\x1fhttp://a.com/x\0", "http://a.com/x"),
    ("ht\ttp://a.\ncom/x\ty\r\nz", "http://a.com/xyz"),
    ("http:\\\\a.com\\x\\y?b\\c", "http://a.com/x/y?b\\c"),
    ("http:/a.com/x", "http://a.com/x"),
    ("http:a.com/x", "http://a.com/x"),
    ("http:///a.com/x", "http://a.com/x"),
    ("http://a.com/?b=2&a=1&a=0&c", "http://a.com/?b=2&a=1&a=0&c"),
    ("http://a.com?q", "http://a.com/?q"),
    ("http://a.com/x?", "http://a.com/x?"),
    ("http://a.com/x?q=a b'\"é", "http://a.com/x?q=a%20b%27%22%C3%A9"),
    ("http://a.com/x#frag", "http://a.com/x"),
    ("http://a.com/x?#", "http://a.com/x?"),
    ("http://a.com#?no=query", "http://a.com/"),
    ("http://user:pa%20ss@a.com/", "http://user:pa%20ss@a.com/"),
    ("http://user@:80/", None),
    ("http://me@you@a.com/", "http://me%40you@a.com/"),
    ("http://a.com./x", "http://a.com./x"),
    ("http://a_b.com/", "http://a_b.com/"),
    ("http://münchen.de/straße", "http://xn--mnchen-3ya.de/stra%C3%9Fe"),
    ("http://MÜNCHEN.de/", "http://xn--mnchen-3ya.de/"),
    ("http://mu\u0308nchen.de/", "http://xn--mnchen-3ya.de/"),
    ("http://faß.de/", "http://xn--fa-hia.de/"),
    ("http://例え。テスト/画像.png", "http://xn--r8jz45g.xn--zckzah/%E7%94%BB%E5%83%8F.png"),
    ("http://ｅｘａｍｐｌｅ.com/", "http://example.com/"),
    ("http://ex\u00adample.com/", "http://example.com/"),
    ("http://☃.net/😀", "http://xn--n3h.net/%F0%9F%98%80"),
    ("http://%65xample.com/", "http://example.com/"),
    ("http://a.com/\ud83d\ude00", "http://a.com/%F0%9F%98%80"),
    ("http://a.com/\ud800", "http://a.com/%EF%BF%BD"),
    ("http://a\ud800.com/", None),
    ("http://a\0.com/", None),
    ("http://a.com/x\0y", "http://a.com/x%00y"),
    ("http://a b.com/", None),
    ("http://[2001:DB8:0:0:0:0:0:1]:80/", "http://[2001:db8::1]/"),
    ("http://[::ffff:192.0.2.1]/", "http://[::ffff:c000:201]/"),
    ("http://[::1/", None),
    ("http://0x7f.1/", "http://127.0.0.1/"),
    ("http://2130706433/", "http://127.0.0.1/"),
    ("http://256.0.0.1/", None),
    ("http://", None),
    ("https://?q", None),
    ("", None),
    ("n/a", None),
    ("/images/a.jpg", None),
    ("//a.com/x", None),
    ("www.a.com/x.jpg", None),
    ("FTP://A.com:21/x#y", "ftp://a.com/x"),
    ("data:image/png;base64,AA==", "data:image/png;base64,AA=="),
    ("javascript:alert(1)//#x", "javascript:alert(1)//"),
    ("file:///etc/passwd", "file:///etc/passwd"),
    ("example.com:80/a", "example.com:80/a"),
]

ANY_TEXT = st.text(st.characters(), max_size=60)  # lone surrogates and NUL included
LIKELY = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "http:",
                "//",
                "/",
                "\\",
                "?",
                "#",
                "@",
                ":",
                "..",
                "a.com",
                "é",
                "%2e",
                "[::1]",
                "\t",
                "\xa0",
                "\ufeff",
                "\ud800",
                "\0",
                "xn--",
                "0x7f",
                "^",
                "'",
            ]
        ),
        ANY_TEXT,
    ),
    max_size=12,
).map("".join)


def test_normalisation_has_the_version_of_the_vectors() -> None:
    assert NORMALISATION == 1


@pytest.mark.parametrize(("url", "expected"), VECTORS, ids=[repr(url) for url, _ in VECTORS])
def test_vectors(url: str, expected: str | None) -> None:
    assert normalise(url) == expected
    if expected is not None:
        assert keys([url]) == ([expected], [hashlib.sha256(expected.encode()).hexdigest()[:24]])


def test_keys_are_frozen() -> None:
    assert key("HTTP://Example.com:80/a.jpg#x") == "4fd63207a70baba7076795ee"
    assert key("http://example.com/a.jpg") == hashlib.sha256(b"http://example.com/a.jpg").hexdigest()[:24]
    assert key(" n/a\n") == hashlib.sha256(b"n/a").hexdigest()[:24]
    assert key("http://münchen.de/") != key("http://munchen.de/")


def test_a_batch_keeps_its_order_and_names_what_is_malformed() -> None:
    texts, names = keys(["http://A.com#1", None, " /rel ", "http://a.com/", "http://\ud800", ""])
    assert texts == ["http://a.com/", "", "/rel", "http://a.com/", "http://\ufffd", ""]
    assert [len(name) for name in names] == [24] * 6
    assert names[0] == names[3]
    assert names[1] == names[5]
    assert len(set(names)) == 4
    assert pa.array(texts, pa.string()).to_pylist() == texts
    assert keys([]) == ([], [])


@given(st.one_of(ANY_TEXT, LIKELY))
def test_any_text_has_one_spelling_and_a_key(url: str) -> None:
    spelled = normalise(url)
    (text,), (name,) = keys([url])
    assert key(url) == name == hashlib.sha256(text.encode()).hexdigest()[:24]
    if spelled is None:
        assert normalise(text) is None
    else:
        assert text == spelled == normalise(spelled)
        assert spelled.isascii()
        assert "#" not in spelled
    assert keys([text]) == ([text], [name])
    assert normalise(f" {url}\n") == spelled


@pytest.mark.parametrize(
    "unit", ["é", "a.", "../", "x/../", "@", "1", ":", "\ud800", "%41", " ", "\u0301", "xn--9", "\0"]
)
@pytest.mark.parametrize("head", ["", "http://", "http://[", "http://a.com/", "http://a.com/?", "data:"])
def test_long_text_is_quick(head: str, unit: str) -> None:
    url = head + unit * (100_000 // len(unit))
    start = time.process_time()
    normalise(url)
    assert key(url) == key(url + " ")
    assert time.process_time() - start < 1
