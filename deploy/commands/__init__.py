"""The commands of `python -m deploy`, in the form that `serving.commands` describes."""
