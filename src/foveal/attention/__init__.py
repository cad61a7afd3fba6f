"""One attention, many backends: spec, mask, merge, selection and the one door."""
