"""The isolated process that touches the device, and what its parent knows of it."""
