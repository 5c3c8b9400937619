"""One spelling per URL, and the key that names a sample for ever; ingest calls this on every row of a source.

The key of a row must not depend on the machine, the shard size or the order of the list, and two spellings of one
address must meet. The spelling is the one that browsers use (WHATWG URL standard, "serialising"), as `ada_url` does it.
"""

import hashlib
from collections.abc import Sequence

from ada_url import normalize_url

# Stored with every ingest. Raise it when a frozen vector of the tests changes: old keys then stay with old ingests.
NORMALISATION = 1

KEY_DIGITS = 24  # 96 bits: at ten billion rows a collision has odds of one in a billion

# White space and controls at either end, and the byte-order mark that a list's first line may carry. Written out
# because what str.strip() removes is Unicode's table, which moves with the Python version; a key must not.
_EDGES = (
    "".join(map(chr, range(33)))
    + "\x7f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff"
    + "".join(map(chr, range(0x2000, 0x200B)))
)


def normalise(url: str) -> str | None:
    """Spell an absolute URL as a browser would and drop its fragment; None where it is not an absolute URL.

    White space and controls at the ends go; then the WHATWG rules: scheme and host in lower case, host in punycode,
    default port dropped, dot segments resolved, `\\` read as `/`, tabs and line ends inside dropped, and what may not
    stand in a URL percent-encoded. What is already percent-encoded, user name and password, the order of the query, a
    trailing dot of the host and a lone `?` stay as they are: servers may tell them apart.

    Every scheme is welcome here (`ftp:`, `data:`, `javascript:`), so that download can reject it under its own name;
    None is for what no browser could open: relative URLs, no host after `http:`, hosts and ports that cannot be.
    By these rules `example.com:80/a` is an absolute URL of the scheme `example.com`. Never raises.
    """
    return _parse(_clean(url))


def key(url: str) -> str:
    """Name a URL: the first 24 hex digits of sha256 of its normalised form, or of its cleaned text if it has none."""
    return keys([url])[1][0]


def keys(urls: Sequence[str | None]) -> tuple[list[str], list[str]]:
    """Normalise and name many URLs, in order: (texts, keys), with keys[i] = sha256(texts[i] in UTF-8)[:24].

    Where a URL does not normalise, its text is the given one with its ends stripped and its lone surrogates replaced
    (so that Arrow can hold it), "" for None: download rejects it as `bad_url`, and the row keeps a stable key.
    About 2.5 microseconds a URL.
    """
    texts: list[str] = []
    names: list[str] = []
    for url in urls:
        text = _clean(url or "")
        text = _parse(text) or text
        texts.append(text)
        names.append(hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS])
    return texts, names


def _clean(url: str) -> str:
    url = url.strip(_EDGES)
    if url.isascii():
        return url
    try:
        url.encode()
    except UnicodeEncodeError:  # browsers read text as UTF-16: pairs of surrogates join, lone ones become U+FFFD
        url = url.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return url


def _parse(url: str) -> str | None:
    try:
        spelled: str = normalize_url(url)
    except ValueError:
        return None
    return spelled.partition("#")[0]
