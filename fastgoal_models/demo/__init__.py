"""Real photographs with long captions, for `fastgoal demo`."""
