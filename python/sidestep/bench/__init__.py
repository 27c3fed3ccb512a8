"""The suites of ``sidestep bench``, one module each: ``run(...)`` returns the JSON document."""
