"""A source of clips that somebody generates: a dot that the action moves."""

import numpy as np

from wmjax.data.source import Source
from wmjax.data.stats import summarize


class Dots(Source):
    def __init__(self, *, frames, height, width, stride, seed, split, views=1, dots=60):
        self.frames, self.stride, self.views = frames, stride or 1, views
        self.state_size, self.action_size = 3, 7
        self.label_sizes = {"state": 3}
        self._size, self._dots = (height, width), dots
        self._seed = (seed, split == "train")

    def __len__(self):
        return self._dots

    def _motion(self, index):
        rng = np.random.default_rng((*self._seed, index))
        action = rng.normal(size=(self.frames, self.stride, 7)).astype(np.float32)
        state = np.cumsum(action.sum(axis=1)[:, :3], axis=0) + 100.0
        return state.astype(np.float32), action, rng

    def __getitem__(self, index):
        state, action, rng = self._motion(index)
        video = rng.integers(0, 60, (self.frames, *self._size, 3), np.uint8)
        rows = (10 * state[:, 0]).astype(int) % self._size[0]
        video[np.arange(self.frames), rows] = 255
        return {
            "frames_VT": [list(video)] * self.views,
            "state_TS": state,
            "action_TPA": action,
            "episode": index,
            "start": 0,
        }

    def labels(self, dataset, index):
        return index, {"state": self._motion(index)[0]}

    def statistics(self):
        motions = [self._motion(index)[:2] for index in range(10)]
        state = np.concatenate([state for state, _ in motions])
        action = np.concatenate([action.reshape(-1, 7) for _, action in motions])
        return [{"state": summarize(state), "action": summarize(action)}]
