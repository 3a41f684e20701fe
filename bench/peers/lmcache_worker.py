"""A worker of LMCache's server, as a process of LMCache's own environment: no part of kvd is there.

    python lmcache_worker.py PORT FD BYTES       orders in lines of JSON, answers in the same way

Payloads come and go through the memory of FD, which is not timed: what is timed goes between the
server's shared memory and a private, touched buffer. Calls are those of LMCache's own adapter for
engines that copy themselves, without gathering a paged cache first.

K/V has 16 layers of f16, and LMCache's usual 256 tokens a chunk; a token is as large as it takes
for a chunk of at most 8 MiB. Whatever is stored is cleared before the next store, untimed: a full
pool refuses every store until the next of the server's ticks, which is another number.
"""

import json
import mmap
import os
import sys
import time

import numpy as np
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc
from lmcache.v1.multiprocess.custom_types import (
    IPCCacheServerKey,
    RegisterEngineDrivenContextPayload,
)
from lmcache.v1.multiprocess.transfer_context.base import (
    EngineDrivenContextMetadata,
    create_engine_driven_context,
)
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

CHUNK_TOKENS = 256
CHUNK_BYTES = 8 << 20
LAYERS = 16
TOKEN_PLANES = 2 * LAYERS
UNIT = TOKEN_PLANES * CHUNK_TOKENS * 2
"""Bytes of a chunk for each element of a row."""
TIMEOUT = 60.0


class Side:
    """What is registered for payloads of one length: a model of its own."""

    def __init__(self, client, size, number):
        units, rest = divmod(size, UNIT)
        if rest:
            raise ValueError(f"{size} bytes are not whole chunks")
        n_chunks = -(-size // CHUNK_BYTES)
        while units % n_chunks:
            n_chunks += 1
        self.n_chunks, hidden = n_chunks, units // n_chunks
        self.model, self.instance = f"bench-{size}", os.getpid() * 1000 + number
        self.client = client
        response = client.register_kv_cache_engine_driven_context(
            RegisterEngineDrivenContextPayload(
                instance_id=self.instance,
                model_name=self.model,
                world_size=1,
                block_size=16,
                num_layers=LAYERS,
                hidden_dim_size=hidden,
                dtype_str="float16",
                use_mla=False,
                num_physical_slots=CHUNK_TOKENS,
            )
        ).result(timeout=TIMEOUT)
        if not response.shm_name:
            raise ValueError("LMCache has no shared memory here")
        shape = torch.Size([2, LAYERS, CHUNK_TOKENS, hidden])
        layout = MemoryLayoutDesc(shapes=[shape], dtypes=[torch.float16])
        self.context = create_engine_driven_context(
            EngineDrivenContextMetadata(layout, 16, False),
            client,
            TIMEOUT,
            shm_name=response.shm_name,
            pool_size=response.pool_size,
        )
        self.private = np.ones(size, np.uint8)
        self.keys = {}
        self.count = 0

    def store(self, key):
        """Seconds."""
        self.client.clear(True).result(timeout=TIMEOUT)
        self.count += 1
        n_tokens = self.n_chunks * CHUNK_TOKENS
        tokens = (self.count + (1 << 24), *range(1, n_tokens))
        name = self.keys[key] = self._key(tokens, "store")
        chunks = self.private.reshape(self.n_chunks, -1)
        started = time.perf_counter()
        out, indices = self.context.prepare_store(name, self.instance)
        for tensor, index in zip(out, indices, strict=True):
            np.copyto(flat(tensor), chunks[index])
        stored = self.context.commit_store(name, self.instance, [])
        taken = time.perf_counter() - started
        self.client.end_session(name.request_id).result(timeout=TIMEOUT)
        if not stored or len(indices) != self.n_chunks:
            raise ValueError(f"LMCache has stored {len(indices)} of {self.n_chunks} chunks")
        return taken

    def fetch(self, key):
        """Seconds."""
        name = self._key(self.keys[key].token_ids, "fetch")
        chunks = self.private.reshape(self.n_chunks, -1)
        started = time.perf_counter()
        self.client.lookup(name.no_worker_id_version(), 1).result(timeout=TIMEOUT)
        found = self.client.wait_prefetch_status(name.request_id, TIMEOUT).result(timeout=TIMEOUT)
        if found != self.n_chunks:
            raise ValueError(f"LMCache has found {found} of {self.n_chunks} chunks")
        slots = self.context.prepare_retrieve(name, self.instance)
        for tensor, chunk in zip(slots, chunks, strict=True):
            np.copyto(chunk, flat(tensor))
        self.context.commit_retrieve(name, self.instance)
        self.client.end_session(name.request_id).result(timeout=TIMEOUT)
        return time.perf_counter() - started

    def _key(self, tokens, what):
        self.count += 1
        return IPCCacheServerKey(
            model_name=self.model,
            world_size=1,
            worker_id=0,
            token_ids=tokens,
            start=0,
            end=len(tokens),
            request_id=f"{what}-{self.model}-{self.count}",
            num_kv_readers=1,
        )


def flat(tensor):
    """The bytes of a tensor, without a copy."""
    return tensor.view(torch.uint8).reshape(-1).numpy()


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is said
    port, fd, size = map(int, sys.argv[1:])
    shared = np.frombuffer(mmap.mmap(fd, size), np.uint8)
    client = RequestClientFactory.create(f"tcp://127.0.0.1:{port}")
    client.ping(None).result(timeout=TIMEOUT)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    sides = {}
    for line in sys.stdin:
        order = json.loads(line)
        length = order["bytes"]
        try:
            side = sides[length] = sides.get(length) or Side(client, length, len(sides))
            if order["do"] == "store":
                np.copyto(side.private, shared[:length])
                answer = {"seconds": side.store(order["key"])}
            else:
                answer = {"seconds": side.fetch(order["key"])}
                np.copyto(shared[:length], side.private)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    for side in sides.values():
        side.context.close()
    client.close()


if __name__ == "__main__":
    main()
