"""Students: architectures, initialisations and exported files."""
