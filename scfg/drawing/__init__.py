"""Pictures from what a run did; knows no host."""
