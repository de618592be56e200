"""Models out: written as another library reads them, and read back by that library before they count."""
