"""What a retrieval model is trained on: which triplets, texts and views of images a step draws."""
