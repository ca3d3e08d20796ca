"""The program around the engine: data, models, loop, records, pictures."""
