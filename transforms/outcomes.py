"""How a sample can end: the closed list of reasons, in one place, shared by every step, the report and the tests.

`rejected` is policy (a rule said no); `failed` is a fault and is either transient (worth another try) or lasting.
"""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["kept", "rejected", "failed"]


@dataclass(frozen=True)
class Reason:
    """One way to leave the chain: which outcome it means, whether another try may help, and what to tell a person."""

    outcome: Outcome
    meaning: str
    transient: bool = False


class Drop(Exception):  # noqa: N818  (an outcome of one sample, not an error of the program)
    """Ends one sample with a reason of its step's closed list and a detail for a person."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


# Any step may give these: the guard, and where a list was stored after the rows had come in.
FAULTS = {
    "error": Reason("failed", "the step raised an exception on this sample (class and message in the detail)"),
    "out_of_memory": Reason("failed", "memory ran out even for this sample alone", transient=True),
    "crashed": Reason("failed", "the worker process died on this sample, alone and more than once"),
    "taken_down": Reason("rejected", "a takedown list names it"),
}

REASONS: dict[str, dict[str, Reason]] = {
    "download": {
        "bad_url": Reason("rejected", "not an absolute URL with a host"),
        "bad_scheme": Reason("rejected", "a scheme other than http and https"),
        "blocked_address": Reason("rejected", "the host resolves to a private, local or reserved address"),
        "blocked_domain": Reason("rejected", "the domain, or one above it, is on the recipe's list"),
        "robots_disallowed": Reason("rejected", "the host's robots.txt disallows it"),
        "opted_out": Reason("rejected", "the owner objects: X-Robots-Tag, tdm-reservation or tdmrep.json"),
        "dns_not_found": Reason("failed", "the host name does not exist"),
        "dns_timeout": Reason("failed", "the resolver did not answer", transient=True),
        "connect_refused": Reason("failed", "the host refused or reset the connection", transient=True),
        "connect_timeout": Reason("failed", "no connection within the limit", transient=True),
        "tls_error": Reason("failed", "the certificate or the TLS handshake is not valid"),
        "http_4xx": Reason("failed", "the server says that there is no such thing for us (code in the detail)"),
        "http_429": Reason("failed", "the server asks for fewer requests", transient=True),
        "http_5xx": Reason("failed", "the server has a fault (code in the detail)", transient=True),
        "http_other": Reason("failed", "an answer that is no answer to a GET (code in the detail)"),
        "bad_response": Reason("failed", "the answer breaks the rules of HTTP", transient=True),
        "read_timeout": Reason("failed", "the server stopped sending", transient=True),
        "too_slow": Reason("failed", "the whole fetch took longer than the limit", transient=True),
        "redirect_loop": Reason("failed", "more redirects than the limit"),
        "empty": Reason("failed", "a body of zero bytes"),
        "archive_missing": Reason("failed", "the archive that ingest read, or the image in it, is not there"),
        "archive_damaged": Reason("failed", "the archive is broken where the image should be"),
        "archive_changed": Reason(
            "failed", "another archive than ingest read lies there; put that back, then --retry failed", transient=True
        ),
        "archive_unreadable": Reason(
            "failed", "reading the archive failed (class and message in the detail)", transient=True
        ),
        "too_large": Reason("rejected", "more bytes than the limit"),
        "hash_mismatch": Reason("rejected", "other bytes than the list's digest names: poisoned, or changed since"),
        "not_an_image": Reason("rejected", "no image of an allowed format"),
        "animated": Reason("rejected", "more than one frame, and the recipe drops what moves"),
        "decode_error": Reason("failed", "an image that cannot be decoded whole (truncated or corrupt)"),
        "too_many_pixels": Reason("rejected", "more pixels than the limit"),
        "too_small": Reason("rejected", "a side shorter than the limit"),
        "bad_aspect": Reason("rejected", "longer for its width than the limit"),
    },
    "dedup": {
        "contaminated": Reason("rejected", "a copy of an evaluation image (named in the detail)"),
        "duplicate_exact": Reason("rejected", "the same image as an earlier one (its key in the detail)"),
        "duplicate_near": Reason("rejected", "nearly the same image as an earlier one (its key in the detail)"),
    },
    "caption": {  # where several captions of an image end differently: faults first, then in this order
        "endpoint_error": Reason(
            "failed", "no usable answer from the server, however often it was asked", transient=True
        ),
        "endpoint_refused": Reason("failed", "the server refuses this request (code and message in the detail)"),
        "content_filter": Reason("rejected", "the server's content filter stopped the image or the caption"),
        "refusal": Reason("rejected", "the model declined to describe the image"),
        "wrong_language": Reason("rejected", "the caption is surely in another language than the recipe wants"),
        "repetition": Reason("rejected", "the model went round in a loop, and nothing usable stands before it"),
        "prompt_echo": Reason("rejected", "the model said its prompt back, and nothing else"),
        "empty_caption": Reason("rejected", "no caption: the web caption is empty, or the model wrote nothing"),
    },
    "phrases": {},
    "ground": {},
    "score": {},
    "select": {
        "too_small": Reason("rejected", "a side of the image is shorter than the limit"),
        "bad_aspect": Reason("rejected", "the image is longer for its width than the limit"),
        "ungrounded": Reason("rejected", "too few of the image's phrases were found in it"),
        "no_regions": Reason("rejected", "no detection passed the filter, and the recipe rejects such images"),
        "low_best_score": Reason("rejected", "no region scores as much as the recipe asks of one at least"),
    },
    "pack": {},
}


def reason_of(step: str, name: str) -> Reason:
    """Look up a reason of a step, or of the guard. Raises KeyError for one that is not on the closed list."""
    return FAULTS[name] if name in FAULTS else REASONS[step][name]
