"""The ground floor: errors, dtypes, units, shapes, paths and logging. Imports nothing of foveal."""
