"""The address at which programs in other processes, or other libraries, call a sample's policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_rft.errors import ConfigurationError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["Endpoint"]


@dataclass(frozen=True)
class Endpoint:
    """An address in OpenAI's dialect at which an unmodified agent calls the policy of one sample.

    It takes ``/v1/chat/completions`` and ``/v1/completions`` (streams, tools, log-probs) and, beside ``/v1``, vLLM's
    ``/inference/v1/generate``. Every call is a turn of the sample, as if the workflow had made it: the sampled ids are
    those that are trained, also where a client sends its conversation back as text. The run's way of sampling replaces
    a client's temperature, ``top_p`` and the like; a request that training could not account for (``n`` above 1,
    penalties) is refused. A client that tries again by itself gets the answer to its first try. The endpoint ends with
    the sample: later calls get status 401.

    Attributes:
        base_url: Such as ``"http://127.0.0.1:41873/v1"``; reachable from this machine alone.
        api_key: Names the sample, and is a secret of its workflow.

    Example::

        async def workflow(task, policy):
            endpoint = policy.endpoint(tool_parser="hermes")
            async with endpoint.openai() as client:
                said = await client.chat.completions.create(model="policy", messages=task.prompt)
            return said.choices[0].message.content
    """

    base_url: str
    api_key: str = field(repr=False)

    def openai(self, **settings: Any) -> AsyncOpenAI:
        """A client of the ``openai`` package.

        Args:
            **settings: Arguments of ``openai.AsyncOpenAI``, such as ``max_retries`` or ``timeout`` in seconds.

        Raises:
            ConfigurationError: The package is not installed.
        """
        try:
            import openai
        except ImportError as error:
            raise ConfigurationError(
                "Endpoint.openai() needs the package openai: pip install openai, or give base_url and api_key to "
                "another client"
            ) from error
        # Not through a proxy, which could not reach this address, and without the certificates of others.
        client = openai.DefaultAsyncHttpxClient(trust_env=False, verify=False)
        return openai.AsyncOpenAI(
            **{"base_url": self.base_url, "api_key": self.api_key, "http_client": client, **settings}
        )
