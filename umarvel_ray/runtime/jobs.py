"""Ray's job server: hand in, follow, ask; what it says in many words becomes one line."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from umarvel_ray.errors import ResourceError
from umarvel_ray.runtime.cluster import prepare_environment

RUNNING = ("PENDING", "RUNNING")
_POLL_S = 1.0
_PATIENCE_S = 60.0
"""How long a server may be away before who follows a job gives up; the job does not notice."""


class JobServer:
    """A cluster's job server.

    Raises:
        ResourceError: Nobody answers at the address, or it wants a token that we do not have.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        prepare_environment()
        from ray.job_submission import JobSubmissionClient

        with self._answering():
            self._client = JobSubmissionClient(address)

    def states(self, prefix: str) -> dict[str, str]:
        """Id → status of every submission whose id starts so, oldest first."""
        with self._answering():
            jobs = self._client.list_jobs()
        mine = [job for job in jobs if (job.submission_id or "").startswith(prefix)]
        mine.sort(key=lambda job: job.start_time or 0)
        return {str(job.submission_id): job.status.value for job in mine}

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        *,
        folder: Path,
        env: dict[str, str],
        metadata: dict[str, str],
    ) -> bool:
        """Hand in a job that starts in a copy of `folder`.

        Returns:
            False where a job of that id is there already: ids are unique, so nobody starts one twice.
        """
        with self._answering():
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    runtime_env={"working_dir": str(folder), "env_vars": env},
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                return False
        return True

    def follow(self, submission_id: str, write: Callable[[str], None]) -> None:
        """Hand on what a job prints until it ends; a connection that breaks is taken up where it was."""
        shown = 0

        async def tail() -> None:
            nonlocal shown
            passed = 0
            async for text in self._client.tail_job_logs(submission_id):
                # The server starts from the beginning each time.
                new = text[max(0, shown - passed) :]
                passed += len(text)
                if new:
                    write(new)
                shown = max(shown, passed)

        unheard = 0.0
        while True:
            with suppress(Exception):  # whatever breaks the line: whether the job ended is asked next
                asyncio.run(tail())
            try:
                if self.status(submission_id) not in RUNNING:
                    return
                unheard = 0.0
            except ResourceError:
                unheard += _POLL_S
                if unheard > _PATIENCE_S:
                    raise
            time.sleep(_POLL_S)

    def status(self, submission_id: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        with self._answering():
            return self._client.get_job_status(submission_id).value

    def exit_code(self, submission_id: str) -> int:
        """Of a job that ended: its process's own; 1 where it never got that far."""
        with self._answering():
            info = self._client.get_job_info(submission_id)
        if info.driver_exit_code is not None:
            return info.driver_exit_code
        return 0 if info.status.value == "SUCCEEDED" else 1

    def message(self, submission_id: str) -> str:
        """What the server says of a job, in one line."""
        with self._answering():
            return " ".join(str(self._client.get_job_info(submission_id).message or "").split())

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            said = " ".join(str(error).split())
            if "uthentication" in said or "401" in said or "403" in said:
                raise ResourceError(
                    f"{self.address}: the cluster refuses us. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or "
                    "put its token in ~/.ray/auth_token."
                ) from None
            if isinstance(error, ConnectionError | OSError | RuntimeError):
                raise ResourceError(
                    f"{self.address}: no job server answers ({said[:200]}). Give the dashboard's address, "
                    "such as http://localhost:8265, and forward its port where the cluster is remote."
                ) from None
            raise
