"""Every stage timed beside its peers, and its cost against the size of what it is given: clients of the stages."""
