"""Finding exact and near duplicates."""
