"""Files and folders: how they appear whole, how damage is noticed, how one job at a time uses them, and how what is
there differs from what is wanted. Imports `ranks` alone."""
