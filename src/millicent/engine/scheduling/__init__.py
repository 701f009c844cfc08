"""Who runs next, and in which KV blocks: integers only, so that the simulator can replay it without a model."""
