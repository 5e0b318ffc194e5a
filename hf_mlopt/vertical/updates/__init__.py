"""Block updates of vertical federated learning: losses, pre-cut batches, SGD, SVRG and SAGA. Arrays in, arrays out."""
