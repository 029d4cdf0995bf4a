"""One process of a run of several: wmjax.main, which notes the clips that its loop is handed.

    python tests/member.py FILE --coordinator=HOST:PORT --processes=N --process=I ...

FILE has a line of JSON for each batch of training: the ids of those clips that this process holds.
"""

import itertools
import json
import sys

from jax._src import cache_key

from wmjax import main, train

NOTES = sys.argv.pop(1)

# All processes run one program, and jax can hand it from the first to the others; but on CPUs it
# goes by a fingerprint of the devices, which is another in each process.
cache_key._hash_accelerator_config = cache_key._hash_devices


class Noted(train.Batches):
    _streams = itertools.count()

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._trains = next(self._streams) == 0  # validation opens its own

    def __next__(self):
        batch = super().__next__()
        if self._trains:
            shards = sorted(batch.sample_ids_B.addressable_shards, key=lambda s: s.index[0].start)
            with open(NOTES, "a") as file:
                print(json.dumps([i for shard in shards for i in shard.data.tolist()]), file=file)
        return batch


train.Batches = Noted
main.cli()
