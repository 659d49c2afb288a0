"""Plugins that let serving engines ask a policy. Each imports its engine only inside its functions, and no torch."""
