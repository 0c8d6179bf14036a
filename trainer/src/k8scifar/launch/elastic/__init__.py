"""Groups whose nodes leave and return: who takes part in an attempt, and where they meet."""
