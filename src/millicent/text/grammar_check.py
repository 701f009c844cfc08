"""`python -m millicent.text.grammar_check`: compiles strangers' grammars where nothing but this process can suffer.

A line of JSON comes in, the grammar; a line goes out, what is wrong with it, or null. A grammar that takes longer than
`CPU_S` of processor time ends it: how busy the machine is makes no difference to what can be used.
"""

from __future__ import annotations

import json
import signal
import sys

from millicent.core.errors import InvalidRequest
from millicent.text.grammars import compile_grammar, vocabulary

CPU_S = 1.0
_MEMORY_BYTES = 2 << 30


def main() -> int:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Whether a grammar can be used hardly depends on the vocabulary: single bytes lead to every one of its states.
    words = vocabulary([*(bytes([byte]) for byte in range(256)), b""], [b""] * 256 + [b"<end>"], [256])
    _say(None)  # ready
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            compile_grammar(json.loads(line), words)
        except InvalidRequest as error:
            _say(error.message)
        else:
            _say(None)
        signal.setitimer(signal.ITIMER_PROF, 0)
    return 0


def _say(complaint: str | None) -> None:
    sys.stdout.buffer.write(json.dumps(complaint).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
