"""Share a K/V cache between the LLM workers of one machine.

`connect` gives the blocking client, `aio.connect` the asyncio one; `Model` tells what K/V looks
like. For engines: `arrays` (NumPy and the like), `integrations.llama` (llama-cpp-python).
"""

from kvd_client import errors
from kvd_client.client import Client, Context, Sequence, connect
from kvd_client.peeking import PromptKeys
from kvd_client.session import Commit
from kvd_client.staging import Staged
from kvd_client.state import Model

__all__ = [
    "Client",
    "Commit",
    "Context",
    "Model",
    "PromptKeys",
    "Sequence",
    "Staged",
    "connect",
    "errors",
]
