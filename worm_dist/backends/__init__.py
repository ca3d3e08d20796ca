"""How a network is wrapped and stepped: DistributedDataParallel, DeepSpeed, a bare module."""
