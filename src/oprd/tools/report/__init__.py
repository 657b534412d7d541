"""`oprd report`: one offline HTML page about one or several run folders."""
