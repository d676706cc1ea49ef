"""The sections of a run's report, a module for each; a section says what it lacks."""
