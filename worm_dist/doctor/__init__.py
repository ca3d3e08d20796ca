"""Doctor: is this environment fit for a run, before a long job is queued."""
