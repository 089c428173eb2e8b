"""Other tools' logs as rollouts: one small file a form, one that tokenises, one that reads files."""
