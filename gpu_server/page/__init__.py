"""The live page of a run, and what is served beside it. A page shows a run and changes nothing."""
