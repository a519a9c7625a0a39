"""Changes a network: inserts and folds BatchNorms, equalizes channels, replaces the output layer."""
