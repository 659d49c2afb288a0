"""The artefact: a policy's schema, its rules, its text, and what one of its tables decides."""
