"""The guard around a step's function: one bad sample costs one sample, never a batch, a part or a run."""

from concurrent.futures import Future
from typing import Any

import pyarrow as pa

from ..models.contract import ModelError
from ..transforms.outcomes import Drop
from .stage import Function, InTwo, answer


def guarded(
    function: Function, batch: pa.Table, step: str, emits: pa.Schema, prepared: Future[Any] | None = None
) -> pa.Table:
    """Call `function`; where it raises, halve the batch until the one bad row is alone, which fails with its error.

    `prepared` is what a function in two moments has made of the batch ahead; a half is prepared anew.
    Halving also is the answer to an accelerator that is out of memory. Raises ModelError only: no sample's fault.
    """
    try:
        if prepared is not None and isinstance(function, InTwo):
            result = function.finish(batch, prepared.result())
        else:
            result = function(batch)
        if not result["key"].equals(batch["key"]):
            raise ValueError("the function did not answer with the rows that it was given")
        return result
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  (the only broad one: whatever a hostile sample sets off ends here)
        if len(batch) == 1:
            memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            text = " ".join(str(error).split())
            drop = Drop("out_of_memory" if memory else "error", f"{type(error).__name__}: {text}")
            return answer(batch, step, [drop], emits)
    middle = len(batch) // 2
    halves = (batch.slice(0, middle), batch.slice(middle))
    return pa.concat_tables([guarded(function, half, step, emits) for half in halves])
