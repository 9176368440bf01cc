"""One file a study: a published experiment, or one of ours, that ends in a record."""
