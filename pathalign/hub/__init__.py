"""What goes to the Hub: artefacts and their cards, Spaces, and jobs on rented machines."""
