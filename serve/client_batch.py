"""OpenAI's Batch API: the same calls handed in as a file, answered within a day, at half price.

What was handed in is written down before and after the handing in, so that a process that is killed
at any point finds its batches again instead of paying for them twice. Answers are streamed to disk
and read line by line. Part of the one place that speaks HTTP (serve/client.py).
"""

import asyncio
import json
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import openai

from candor.errors import UserError
from candor.tables import replace_file
from serve.client import ChatClient, ChatReply, Lost, read_json, read_record, worth_a_retry

MOST_REQUESTS, MOST_BYTES = 20_000, 100_000_000  # of one batch; the API takes 50,000 and 200 MB
_OVER = ("completed", "failed", "expired", "cancelled")
_MARK = "candor_batch"  # metadata key by which a batch is found again

Found = tuple[str, ChatReply | Lost]  # a question's key and how it ended


@dataclass(frozen=True, slots=True)
class Record:
    """A batch that was handed in, or was about to be, and is not collected yet."""

    path: Path
    mark: str
    batch: str | None  # its id at the endpoint, once that is known
    keys: tuple[str, ...]  # of its questions
    dollars: float  # that it costs at most


class Batches:
    """The batches of one store; ``folder`` holds one small JSON file for each that is not collected yet."""

    def __init__(self, client: ChatClient, folder: Path, *, poll_s: float) -> None:
        self.client, self.folder, self.poll_s = client, folder, poll_s
        endpoint = client.endpoint
        self.openai = openai.AsyncOpenAI(
            api_key=endpoint.read_key(),
            base_url=endpoint.url,
            timeout=endpoint.timeout_s,
            max_retries=endpoint.retries,
            http_client=httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(proxy=endpoint.route())),
        )

    def pending(self) -> list[Record]:
        """The batches of all who share the store."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            found.append(Record(path, values["mark"], values["batch"], tuple(values["keys"]), values["dollars"]))
        return found

    async def submit(self, questions: Sequence[tuple[str, str, float]]) -> None:
        """Hand in questions (key, text, dollars it costs at most), in as many batches as it takes."""
        first = 0
        for lines in _cut(json.dumps(self._line(key, text)) for key, text, _ in questions):
            part = questions[first : first + len(lines)]
            first += len(lines)
            mark = uuid.uuid4().hex  # no hash: questions that a batch did not answer are handed in once more
            keys, dollars = tuple(key for key, _, _ in part), sum(most for _, _, most in part)
            record = Record(self.folder / f"{mark}.json", mark, None, keys, dollars)
            self._note(record)
            await self._hand_in(record, ("\n".join(lines) + "\n").encode())

    def _line(self, key: str, text: str) -> dict[str, Any]:
        body = self.client.body(text)
        return {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}

    def _note(self, record: Record) -> None:
        values = {"mark": record.mark, "batch": record.batch, "keys": record.keys, "dollars": record.dollars}
        replace_file(record.path, json.dumps(values).encode())

    async def _hand_in(self, record: Record, data: bytes) -> None:
        try:
            file = await self.openai.files.create(file=("judging.jsonl", data), purpose="batch")
            batch_id = await self._create(file.id, record.mark)
        except openai.APIError as error:
            if isinstance(error, openai.APIStatusError) and not worth_a_retry(error.status_code):
                self.forget(record)  # turned away, for instance for want of a batch API: there is nothing to wait for
            raise self._told(error) from error
        self._note(replace(record, batch=batch_id))

    async def _create(self, file_id: str, mark: str) -> str:
        """Make a batch of a file; its id.

        A call that failed may have made one all the same, which is paid for: before the next try it is looked for.
        """
        endpoint, attempt = self.client.endpoint, 0
        while True:
            try:
                batch = await self.openai.with_options(max_retries=0).batches.create(
                    input_file_id=file_id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={_MARK: mark},
                )
                return str(batch.id)
            except openai.APIConnectionError:
                if attempt == endpoint.retries:
                    raise
            except openai.APIStatusError as error:
                if attempt == endpoint.retries or not worth_a_retry(error.status_code):
                    raise
            await asyncio.sleep(min(endpoint.max_wait_s, endpoint.backoff_s * 2**attempt))
            found = await self._find(mark)
            if found is not None:
                return found
            attempt += 1

    async def collect(self, record: Record) -> list[Found]:
        """Wait for one batch and read its answers; the record stays until ``forget``."""
        try:
            batch_id = record.batch or await self._find(record.mark)
            if batch_id is None:  # killed before it was handed in: its questions are simply still open
                return []
            batch = await self.openai.batches.retrieve(batch_id)
            while batch.status not in _OVER:
                await asyncio.sleep(self.poll_s)
                batch = await self.openai.batches.retrieve(batch_id)
            files = [f for f in (batch.output_file_id, batch.error_file_id) if f]
            if batch.status == "failed" and not files:
                self.forget(record)
                errors = batch.errors.data if batch.errors and batch.errors.data else []
                why = "; ".join(str(e.message) for e in errors[:3]) or "no reason given"
                raise UserError(f"the endpoint turned batch {batch_id} away: {why}. Mend that and run again.")
            return [found for file in files for found in await self._download(file)]
        except openai.APIError as error:
            raise self._told(error) from error

    def forget(self, record: Record) -> None:
        """The batch's answers are stored."""
        record.path.unlink(missing_ok=True)

    async def _find(self, mark: str) -> str | None:
        """The id of a batch that was handed in though its record does not say so."""
        async for batch in self.openai.batches.list(limit=100):
            if (batch.metadata or {}).get(_MARK) == mark:
                return str(batch.id)
        return None

    async def _download(self, file_id: str) -> list[Found]:
        with tempfile.TemporaryFile() as file:
            async with self.openai.files.with_streaming_response.content(file_id) as response:
                async for chunk in response.iter_bytes():
                    file.write(chunk)
            file.seek(0)
            found = []
            for line in file:
                try:
                    answer = read_json(line)
                except ValueError:
                    continue  # it answers nothing, so its question stays open
                found.append(self._read(answer))
            return found

    def _read(self, line: dict[str, Any]) -> Found:
        """One line of an output or error file."""
        key, response = str(line.get("custom_id")), line.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
        if status == 200:
            try:
                reply = read_record(body, self.client.settings.model, self.client.endpoint.answers_as)
            except ValueError as error:
                return key, Lost(str(error))
            return key, reply
        if isinstance(status, int):
            try:
                found = self.client.refused(status, body)
            except UserError as error:  # an account that ran empty, say: the batch's other answers are paid for
                return key, Lost(str(error))
            return key, found if isinstance(found, ChatReply) else Lost(found.reason)
        why = (line.get("error") or {}).get("code")
        return key, Lost(f"batch: {why or status or 'no answer'}")

    def _told(self, error: openai.APIError) -> UserError:
        said = str(error.message).replace(self.client.endpoint.read_key(), "***")[:300]
        return UserError(f"{self.client.endpoint.url}, batch API: {said}. What was handed in is noted; run again.")

    async def close(self) -> None:
        """Close the connections."""
        await self.openai.close()


def _cut(lines: Iterator[str]) -> Iterator[list[str]]:
    """Lines in lots that one batch takes."""
    lot: list[str] = []
    size = 0
    for line in lines:
        if lot and (len(lot) == MOST_REQUESTS or size + len(line) > MOST_BYTES):
            yield lot
            lot, size = [], 0
        lot.append(line)
        size += len(line) + 1
    if lot:
        yield lot
