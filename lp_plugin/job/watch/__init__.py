"""A job's ranks watch over one another, so that none waits for one that is gone."""
