"""``python -m disagg.placement.replan_process``: a PlanQuestion as JSON on stdin, its PlanAnswer on stdout.

A process of its own, at low priority: a plan takes seconds of a core, and the router's loop has none to spare.
"""

import os
import sys
from typing import Final

import msgspec

from disagg.placement.replanning import answer_question
from disagg.scheduling.replan.question import PlanQuestion

_NICENESS: Final = 10


def main() -> None:
    """Answer one question."""
    os.nice(_NICENESS)
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=PlanQuestion)
    sys.stdout.buffer.write(msgspec.json.encode(answer_question(question)))


if __name__ == "__main__":
    main()
