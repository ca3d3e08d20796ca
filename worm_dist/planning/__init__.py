"""What a run would come to, before it is run: groups, sizes, bytes, a step's time."""
