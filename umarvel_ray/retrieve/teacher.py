"""What a student may learn from: scores that are there, whole, and of the reranker that was named."""

from typing import Any

from umarvel_ray.artifacts import changed_settings
from umarvel_ray.errors import ShardError
from umarvel_ray.retrieve.embed import checkpoint_fingerprint
from umarvel_ray.retrieve.scores import read_table


def require_teacher(data: Any) -> None:
    """Look at a teacher's file before a student is trained on it.

    Args:
        data: Settings with `lists`, `list_role` and `teacher`; others than a teacher's are passed over.

    Raises:
        ShardError: The scores are missing, empty, or another reranker's.
    """
    if data.list_role != "teacher":
        return
    if data.lists is None:
        raise ShardError("data.list_role is 'teacher' but data.lists names no file. Give the rerank job's.")
    table, facts = read_table(data.lists)
    if not len(table):
        raise ShardError(f"{data.lists}: holds no query, so nothing to learn. Score a training split.")
    if data.teacher is None:
        return
    given = {"checkpoint": facts.get("checkpoint")}
    if changed_settings(given, {"checkpoint": checkpoint_fingerprint(data.teacher)}):
        raise ShardError(
            f"{data.lists}: these are scores of another checkpoint (its fingerprint was "
            f"{given['checkpoint']}, {data.teacher} has {checkpoint_fingerprint(data.teacher)}). "
            "Score with that reranker, or correct data.teacher."
        )
