"""`POST /v1/embeddings`."""

from __future__ import annotations

from starlette.types import Send

from millicent.core.errors import MillicentError
from millicent.core.identifiers import Ids
from millicent.core.request import Request
from millicent.pipeline.answer import Answer
from millicent.pipeline.pipeline import Pipeline
from millicent.server.config import ServerConfig
from millicent.server.endpoint import Endpoint, cost_header
from millicent.server.responses import send_error, send_json
from millicent.wire import openai_common, openai_embeddings
from millicent.wire.openai_embeddings import EmbeddingShape


class EmbeddingsEndpoint(Endpoint[EmbeddingShape]):
    def __init__(self, pipeline: Pipeline, ids: Ids, config: ServerConfig) -> None:
        super().__init__(openai_embeddings.decode, pipeline, ids, config)

    async def answer(
        self,
        send: Send,
        request: Request,  # noqa: ARG002 - the vectors say it all
        answer: Answer,
        shape: EmbeddingShape,
    ) -> None:
        headers = {"x-millicent-receipt": answer.receipt_id}
        try:
            while await answer.take() is not None:
                pass  # vectors have no text between them
        except MillicentError as error:
            await send_error(send, error, headers=headers | cost_header(answer))
            return
        assert answer.settled is not None
        body = openai_common.encode(openai_embeddings.answer_body(answer.settled, answer.vectors, shape))
        await send_json(send, body, headers=headers | cost_header(answer))
